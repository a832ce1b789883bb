"""What relp.py, models.py, tasks.py and evaluate.py lean on. README.md has a line per file."""
