"""Tables, figures and the HTML report: pure functions from plain data to output."""
