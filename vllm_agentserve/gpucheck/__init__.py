"""`make gpu-check`: one command that shows on one machine what of this project holds there, and writes it to a folder."""
