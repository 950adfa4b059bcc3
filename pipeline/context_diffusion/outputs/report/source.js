// Where rows come from: the page's own data, or the server that sent the page. Both answer the same question:
// {text, status, code, score, low, high, sort, order, offset, limit} -> {total, rows}.
const data = JSON.parse(document.getElementById("data").textContent);
const PAGE = 60;

function scoreOf(row, name) {
  const value = row.scores[name];
  return value === undefined ? null : value;
}

function valueOf(row, sort) {
  return sort in row ? row[sort] : scoreOf(row, sort);
}

// The lowest bin holds what lies below 0 too, the highest what lies above 1.
function within(value, low, high) {
  return value !== null && (low <= 0 || value >= low) && (high >= 1 || value < high);
}

function matches(row, question) {
  const said = [row.id, row.prompt, row.error_message].join("\n").toLowerCase();
  return (!question.text || said.includes(question.text.toLowerCase()))
    && (!question.status || row.status === question.status)
    && (!question.code || row.error_code === question.code)
    && (!question.score || within(scoreOf(row, question.score), question.low, question.high));
}

function sorted(rows, sort, order) {
  if (!sort) return rows;
  const sign = order === "desc" ? -1 : 1;
  return rows.slice().sort((one, other) => {
    const [a, b] = [valueOf(one, sort), valueOf(other, sort)];
    if (a === null || b === null) return (a === null) - (b === null);
    return sign * (a < b ? -1 : a > b ? 1 : 0);
  });
}

const inPage = {
  async find(question) {
    const rows = sorted(data.rows.filter(row => matches(row, question)), question.sort, question.order);
    return { total: rows.length, rows: rows.slice(question.offset, question.offset + question.limit) };
  },
  async row(id, index) {
    return data.rows.find(row => row.id === id && (row.index ?? 0) === index) || null;
  },
  picture: place => place === null ? null : data.pictures[place],
};

async function ask(path, question) {
  const response = await fetch(path + "?" + new URLSearchParams(question));
  if (!response.ok) throw new Error((await response.text()).slice(0, 300));
  return response.json();
}

const served = {
  find: question => ask("rows", question),
  row: async (id, index) => (await ask("row", { id, index })).row,
  picture: url => url,
};

const source = data.served ? served : inPage;
