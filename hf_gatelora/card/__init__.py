"""What is published of an adapter: its card, tables and pictures."""
