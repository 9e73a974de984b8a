"""Storage access: open paths and URIs as file systems, and read and write objects by key, with retries."""
