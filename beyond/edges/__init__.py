"""Edges between components: their scores, their exact patching, and circuits of them. Start with graph.py."""
