"""A course on RelP: lessons.py, the notebook made of it, and what they share. README.md is for the teacher."""
