"""What was learned: evaluations of a frozen or transferred backbone."""
