"""The command `mats`: one thin verb for each thing that the packages do."""
