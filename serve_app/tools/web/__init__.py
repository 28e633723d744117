"""Tools that read the web: which addresses they may reach, and how."""
