"""What results are written and shown with: files, intervals, pictures and pages."""
