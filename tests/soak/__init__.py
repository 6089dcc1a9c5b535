"""Many processes at one store for a long time; nothing acknowledged is ever lost."""
