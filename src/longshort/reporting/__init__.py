"""Tools to write and show results: files, intervals, figures and pages."""
