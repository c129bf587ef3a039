"""A study: settings times seeds, trained by runs of `evit train` and summed up in one table."""
