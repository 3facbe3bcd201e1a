"""Show a build to people: documents, tables, what-if plans and the HTML report."""
