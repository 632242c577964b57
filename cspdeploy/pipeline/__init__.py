"""The export recipe: which steps, in which order; it alone joins the stages."""
