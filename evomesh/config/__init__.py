"""Config files: schema, loader, older spellings and the rules between sections. Never imports torch."""
