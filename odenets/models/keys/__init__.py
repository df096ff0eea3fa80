"""Published key layouts of each family, and how their keys are called here."""
