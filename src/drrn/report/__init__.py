"""Tables, figures, pictures and the page, from records and scores alone."""
