"""Replies as models write them: templates that "|" and line breaks separate, and pieces for soups of such replies."""

from __future__ import annotations

LETTERS = "ABCD"
WORDS = (
    "red",
    "blue",
    "the",
    "Eiffel",
    "Tower",
    "left-hand",
    "12",
    "cm",
    "3.5",
    "cat",
    "dog",
    "a",
    "car",
    "triangle",
    "45",
    "green",
    "circle",
    "north",
    "No",
    "Yes",
    "both",
    "1/2",
)
OPTIONS = (
    ["red", "blue", "green", "yellow"],
    ["12", "120", "1.2", "0.12"],
    ["12 cm", "15 cm", "20 cm", "25 cm"],
    ["Yes", "No"],
    ["The cat is left of the dog", "The dog is left of the cat", "Neither", "Both"],
    ["a", "an apple", "the apple", "apple pie"],
    ["3/11", "8/11", "6/11", "3/5"],
    ["<image 1>", "<image 2>", "<image 3>"],
)
CHOICE_SENTENCES = r"""
{L}|({L})|{L}.|{L})|{L}:|[{L}]|**{L}**|{l}|({l})|{L}. {T}|({L}) {T}|{L}: {T}|{T}|{T}.|The answer is {L}
The answer is {L}.|The answer is ({L}).|the correct answer is **{L}**.|The correct answer is {L}. {T}|Answer: {L}
Answer:{L}|Answer : {L}|Final answer: {L}|The final answer is {T}.|answer is {l}|answer is a {T}|I choose {L}
I select ({L}).|My answer is {L}!|I think it is {L}, because {M} is wrong.|{L} and {M}|{L} or {M}|({L}) or ({M})
Both ({M}) and ({L}).|Not {M} but {L}|Option {L}|Option {L} is correct.|The best option is {L}.|choice: {L}
The image shows {T}. So the answer is {L}.|Looking at the figure, a {T} can be seen, therefore {L}
A cat is on the mat, so {L}|Because of {T}.|A {T}|Both|Neither|\boxed{{{L}}}|$\boxed{{\text{{{L}}}}}$
The answer is $\boxed{{{L}}}$.|<think>maybe {M}</think>{L}|<think>{M}</think>The answer is {L}.|<think>{M}
{M}</think>{L}|<analysis>({M})</analysis>({L})|It is not {M}. It is {T}|None of the above|Cannot determine the answer
I'm sorry, but without the image provided, {L}|Failed to obtain answer via API. {L}|Z|Z.|{L}{M}|{L}, {M}|{L};|'{L}'
"{L}"|정답은 {L}|答案是{L}|答案为 {L}。|選 {L}|选{L}|答えは{L}
{L}\n{T}|({L})\n{T}|{T}\n{L}|{T}\n({L})|{T}\n\nAnswer: {L}
Let's see.\n1. {M} is wrong.\n2. {L} is right.\n\nThe answer is {L}.|{L} is the answer, not {M}.
Answer {M}? No, Answer {L}|<{L}>|{L}>|the answer is option {L}|The choice is {L}|THE ANSWER IS {L}|ANSWER {L}|{L} 
{L}\n|{L}.{M}.|#{L}#|{{{L}}}|*{L}*!|-{L}-|{L}_|{L}/{M}
"""
CHOICE_PIECES = [
    *"ABCDZabcd", "(A)", "(B)", "(C)", "(D)", "A.", "B.", "C.", "D.", "A:", "B:", "C:",
    *".,;:!?'\"()[]{}*#", "\n", " ", " ", " ", "the answer is", "Answer", "answer is", "option", "choice", "is", "a",
    "<think>", "</think>", "red", "blue", "12", "the", "not", "because", "Cannot determine the answer", "i choose", "İ",
]  # fmt: skip
OPEN_SENTENCES = r"""
{N}|{N}.|The answer is {N}|The answer is {N}.|So the result is {N} {U}.|x = {N}|x = {N} {U}|{N} {U}|It could be {N}
${N}|Therefore {N}|Thus the total is {N}, or {O}.|{T}|The final answer is {T}.|is {T}|answer {T}|about {N}|{N}%
{N}, {O}|{N} and {O}|First {O}.\nThen {N}.|The sum is {O}.\nThe answer is {N}\n|f({O}) = {N}|f(x)={O}={N}
<think>{O}</think>{N}|{O}</think>is {N}|result :|= {N}|so , |the answer is \n {N}|I count {N} of them|-{N}|{N}e3|{N}e
1,{N}|{N},000|.{N}|{N}.0|{N}.50|({N})|[{N}, {O}]|a|A|{T} {N}
"""
OPEN_PIECES = [
    *"0123456789", *".,-=e+", "\n", " ", " ", "is ", "so ", "thus ", "answer ", "result ", "final ", "could be ",
    "1,000", "12", "3.5", "1e5", "2.50", "a", "cat", ":", "x=", "%", "$", ". A", "-7", ".5", "12,345.67", "Therefore ",
    "nan", "inf",
]  # fmt: skip
NUMBERS = [
    "0", "1", "2", "3.5", "12", "14", "0.6", "1.45", "100", "1000", "1,000", "-3", "2008", "0.05", "50", "99.5",
    "3.14", "7.10", "12345", "1e3", "-0.5",
]  # fmt: skip
YES_NO = r"""
Yes|No|yes|no|YES|Yes.|No.|Yes, it is.|No, it is not.|Yes/No|yes-no|It is yes|There is no cat|not|None|Yes and no|y|n
"Yes"|(no)|Yes!No|The answer is: No|The answer is:No|<think>yes</think>no|<think>no</think>Yes|no</think>yes|1,000 yes
yes,no|yes, 1,000|yes.no|yes. no|I know|Yesterday|No. 5|no.5|5.no|Nope|Yes\nNo|[yes]|yes...|The dog is, no, yes|No\n
the image shows no such|unclear|{{yes}}|yes;
"""
YES_NO_PIECES = [
    "yes",
    "no",
    "Yes",
    "No",
    " ",
    " ",
    " ",
    *';/[]"{}()=+\\_-><@`,?!.',
    "1,000",
    "know",
    "\n",
    "5",
    "</think>",
]
POINTS = r"""
[{x}, {y}]|({x}, {y})|[{x},{y}]|{x}, {y}|{x} {y}|x={x}, y={y}|x: {x}, y: {y}|{{"x": {x}, "y": {y}}}
click(x={x}, y={y})|pyautogui.click(x={x}, y={y})|The point is [{x}, {y}].|[{x} {y}]|X = {x}; Y = {y}
<point>{x} {y}</point>|({p}%, {q}%)|<bbox>{x} {y} {v} {w}</bbox>|<bbox>[{x}, {y}, {v}, {w}]</bbox>
< bbox id=1 >{x},{y},{v},{w}< / bbox >|<bbox>{x} {y}</bbox>|The box is {x} {y} {v} {w}|rect: {x} {y} {v} {w}|no point
{x}|click(x={x},y={y})|click(x={x}, y=)|x=., y=.|x={x}.1.2, y={y}|[{x}, {y}, {v}, {w}]|({x}, {y}, {v}, {w})
{x}, {y}, {v}, {w}|It is [{x}, {y}, {v}, {w}].|[{x}, {y}] or [{v}, {w}]|<think>[{v}, {w}]</think>[{x}, {y}]|-{x}, {y}
[-{x}, {y}]|(x{x}, y{y})|{x};{y}|move x = {x} and y={y}
"""
CLICKS = r"""
click(x={x}, y={y})|pyautogui.click(x={x}, y={y})|Action: pyautogui.moveTo(x={x}, y={y})|x={x}, y={y}
click(x={x}.0, y={y}.5)|click(x={x}, y={y}) or click(x={v}, y={w})|<think>x=1, y=1</think>click(x={x}, y={y})
click(x={x}, y={y}.)|click(x={v}, y={w})
"""
BOXES = r"""
[{x}, {y}, {v}, {w}]|({x}, {y}, {v}, {w})|[{x},{y},{v},{w}]|The box: [{x}, {y}, {v}, {w}].|{x}, {y}, {v}, {w}
[{x}, {y}]|<think>[0.1, 0.1, 0.2, 0.2]</think>[{x}, {y}, {v}, {w}]|[ {x}, {y}, {v}, {w} ]|[{x} , {y}, {v}, {w}]
[{v}, {w}, {x}, {y}]|none|[{s}, {t}, 500, 700]|({s}, {t}, 999, 999)|[{x}, {y}, {v}, {w}] and [0.1, 0.2, 0.3, 0.4]
[-{x}, {y}, {v}, {w}]|bbox_2d: [{x}, {y}, {v}, {w}, 1]|[{x}, {y}, {v}, {w})|[1, 2, 3]
"""
POINT_PIECES = [
    "0.5", "0.25", "1", "512", "300", "x=", "y=", ", ", ",", " ", "[", "]", "(", ")", "-", "%", "<bbox>", "</bbox>",
    "box", ":", "\n",
]  # fmt: skip
MATH_ANSWERS = [
    "1", "2", "12", "3.5", "0.5", "1/2", "\\frac{1}{2}", "\\frac{3}{4}", "3\\sqrt{2}", "\\sqrt{8}", "2\\sqrt{2}",
    "\\pi", "2\\pi", "1.57", "\\frac{\\pi}{2}", "(1,2)", "(3,4)", "2^{10}", "1024", "5!", "120", "x+1", "1000",
    "1,000", "-3", "0", "45", "\\frac{\\sqrt{3}}{2}", "0.87", "10", "16", "24", "36", "100", "\\frac{1}{3}",
    "0.33", "15\\%", "7", "60^\\circ", "[1,2]",
]  # fmt: skip
MATH_SENTENCES = r"""
{N}|\boxed{{{N}}}|$\boxed{{{N}}}$|The answer is {N}.|The answer is {N}|the final answer is $\boxed{{{N}}}$.
So x = {N}.|So $x={N}$|\[\boxed{{{N}}}\]|First \boxed{{{O}}}, then \boxed{{{N}}}.
The correct answer is {N}. Because {O}.|the answer should be {N}|The area is {N} cm|The area is {N}|The area is {N}.
{N} units|\boxed{{{N}\text{{ cm}}}}|\boxed{{{N}^\circ}}|\boxed{{x={N}}}|\boxed{{\text{{{N}}}}}|\boxed{{{N}}}.
\boxed{{ {N} }}|\boxed{{\left({N}\right)}}|{N}\%|{N}%|${N}$|$$ {N} $$|\dfrac12|\boxed{{{N}|The answer is: {N}
The answer is\n{N}|<think>\boxed{{{O}}}</think>\boxed{{{N}}}|approximately {N}|x \approx {N}|{N} km|{N}m^3|{N}=
The final answer is {N}. Check: {O}|\boxed{{{N}}} is wrong, \boxed{{{O}}} is right|{{}}{N}|\boxed{{\frac{N}{O}}}
\frac{{{N}}}{{{O}}}
"""
MATH_PIECES = [
    *"0123456789", *"+-*/=.,(){}", "\\frac", "\\sqrt", "\\boxed{", "}", "{", "^", "\\pi", "x", " ", "is ",
    "the answer is ",
    "{1}", "{2}", "\\text", "$", "\\", "\\left", "\\approx", "\\cdot", "A", "B\n", " C.", "(d)", "\\times", "\n", ". ",
]  # fmt: skip
