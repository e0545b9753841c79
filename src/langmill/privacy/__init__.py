"""What keeps people out of data: personal details and secrets are found, and taken out or replaced."""
