"""The report for a browser: one page that fetches nothing."""
