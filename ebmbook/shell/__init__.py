"The command line, claims, bench, cost and the book."
