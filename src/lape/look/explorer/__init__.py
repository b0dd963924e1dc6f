"""The explorer: one HTML file in which a person clicks patches and sees what position became, layer by layer."""

from lape.look.explorer.page import explore as explore
