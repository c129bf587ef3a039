"""The commands of `evit`: flags in, one line and one exit status out. Nothing imports them."""
