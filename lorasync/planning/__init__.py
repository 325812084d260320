"""What is known before anything runs: which ways lead to an engine, what a sync costs, what training needs of memory."""
