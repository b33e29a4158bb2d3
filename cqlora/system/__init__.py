"""The ground floor: files, folders and what the operating system says of them."""
