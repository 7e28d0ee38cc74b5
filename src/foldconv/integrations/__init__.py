"""Where other people's trainers meet foldconv: one file for each, which imports its host when it is used."""
