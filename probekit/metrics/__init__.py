"""What is measured: how far pictures are apart, and which role follows."""
