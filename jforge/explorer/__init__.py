"""The explorer: one page that shows what each mechanism's cache keeps, reads and drops at every decode step.

data.build()                                  # what the page shows of mechanisms and shipped models, as plain data
panel.answer(config, context=8192, batch=1)   # what it says of a pasted config.json
page.render(data)                             # the page, one file that loads nothing
"""
