"""Pictures and pages for people: one renderer for every report."""
