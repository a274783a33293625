"""Which formats to choose: allocation at a price, and the search against the user's score."""
