"""Published key layouts of each family, and the names that their keys have here."""
