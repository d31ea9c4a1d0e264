"""What a person sees: progress lines, tables, templates."""
