// Do the live figures work in Firefox? Opens pages from disk, moves the first slider, and says what is seen.
//
// Reads from standard input, as JSON: `firefox`, the program; `pages`, name to address; `look`, a function of the
// figure's root that returns what is seen; `moves`, each { key } to press, { share } of the way to slide, or { button }
// to press. Writes, as JSON, the `version`, and for each page `seen` (at first and after each move) and `wrong` (what
// failed, or was asked of another host).

import { createRequire } from "node:module";
import { text } from "node:stream/consumers";

const puppeteer = createRequire(new URL("../../../book/package.json", import.meta.url))(
  "puppeteer-core",
);
const SLOW = 20_000; // milliseconds
const LOCAL = /^(file|data|blob|about):/;

// As a reader's hand slides: to a share of the range.
const slide = (input, share) => {
  input.value = Number(input.min) + share * (input.max - input.min);
  input.dispatchEvent(new Event("input", { bubbles: true }));
};

async function look(page, { look }) {
  return page.evaluate(`(${look})(document.querySelector(".gp-live"))`);
}

async function move(page, { key, share, button }) {
  const drawn = () => document.querySelector(".gp-live").dataset.drawn;
  const before = await page.evaluate(drawn);
  const slider = await page.$(".gp-live input[type=range]");
  if (button) await (await page.$(`.gp-live ::-p-text(${button})`)).press("Enter");
  else if (key) await slider.press(key);
  else await slider.evaluate(slide, share);
  const settled = (last) => {
    const { drawn, running } = document.querySelector(".gp-live").dataset;
    return drawn !== last && running !== "true";
  };
  await page.waitForFunction(settled, { timeout: SLOW, polling: 20 }, before);
}

async function visit(browser, address, asked) {
  const wrong = [];
  const seen = [];
  const page = await browser.newPage();
  page.on("pageerror", (error) => wrong.push(`script error: ${error.message}`));
  page.on("console", (said) => said.type() === "error" && wrong.push(`console: ${said.text()}`));
  page.on("request", (one) => LOCAL.test(one.url()) || wrong.push(`asked for ${one.url()}`));
  try {
    await page.goto(address);
    await page.waitForSelector(".gp-live[data-drawn]", { timeout: SLOW });
    seen.push(await look(page, asked));
    for (const one of asked.moves) {
      await move(page, one);
      seen.push(await look(page, asked));
    }
  } catch (error) {
    wrong.push(String(error));
  }
  await page.close();
  return { seen, wrong };
}

const asked = JSON.parse(await text(process.stdin));
const browser = await puppeteer.launch({
  browser: "firefox",
  executablePath: asked.firefox,
  headless: true,
});
try {
  const visits = {};
  for (const [name, address] of Object.entries(asked.pages)) {
    visits[name] = await visit(browser, address, asked);
  }
  process.stdout.write(JSON.stringify({ version: await browser.version(), visits }));
} finally {
  await browser.close();
}
