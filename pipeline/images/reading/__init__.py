"""From a reference to the bytes of its image, patient with the storage. Imports names from ``listing``."""
