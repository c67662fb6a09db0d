"""How answers of a colony look to a person."""
