"""The ground floor: files and what is read of them. No torch; nothing of the rooms above."""
