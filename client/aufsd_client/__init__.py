"""Client library of aufsd."""
