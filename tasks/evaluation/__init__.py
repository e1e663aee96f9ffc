"""What the evaluate stage is made of: lighteval's pipeline over our engines, a journal, records and statistics.

Importing lighteval takes seconds, so what the flow, the report and other stages may want (config, statistics, problems,
tokens, journal) imports nothing of it.
"""
