"""How each kind of collector looks to a person. No command line here: cli and colony share it."""
