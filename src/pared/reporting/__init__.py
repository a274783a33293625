"""Reports for people: text for the terminal, `deploy.yaml`, and a page for the browser."""
