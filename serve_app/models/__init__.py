"""What a model application is (local, remote, custom), and how it is called."""
