"""The colour of each join, the same in every figure and page."""

COLOURS = {  # Okabe and Ito, told apart by colour-blind readers
    "basic": "#D55E00",
    "LaPE": "#0072B2",
    "LaPE-sharing": "#56B4E9",
    "share": "#E69F00",
    "unshare": "#009E73",
    "beside": "#999999",
    "PVG": "#CC79A7",
    "MPVG": "#7B3294",  # theirs are used up: a purple, darker than all but LaPE's blue
}
