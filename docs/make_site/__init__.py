"""What the site has beside the pages in this folder: formulas, the home page, the changelog."""
