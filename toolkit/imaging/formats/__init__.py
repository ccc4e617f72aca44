"""One file a kind of image: how it is read, and how its masks are read and written."""
