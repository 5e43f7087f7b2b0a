"""Programs that use a server as clients of others do. They import nothing of this project, so any Python can run them."""
