"""The report's pages, tables and sentences."""
