"""What a person reads. Renders core types; measures nothing."""
