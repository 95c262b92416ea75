-- Neovim 0.11 and later, with yaml-language-server on PATH.
vim.lsp.config("yamlls", {
  cmd = { "yaml-language-server", "--stdio" },
  filetypes = { "yaml" },
  settings = {
    yaml = { schemas = { [vim.fn.getcwd() .. "/.dfmspec/experiment.schema.json"] = "specs/*.yaml" } },
  },
})
vim.lsp.enable("yamlls")
