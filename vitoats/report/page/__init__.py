"""The report page: one self-contained HTML file about compressed models and their measurements."""
