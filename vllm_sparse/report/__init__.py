"""What people look at: the report of a search, and pictures of pattern files and needle grids."""
