"""The features that are compared, the images that all of them have, and labels on their pixels."""
