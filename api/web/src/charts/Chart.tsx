// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
// One uPlot chart: lines over time, a legend that follows the pointer, colours of the scheme. Loaded on demand.
import 'uplot/dist/uPlot.min.css';

import { useComputedColorScheme } from '@mantine/core';
import { useElementSize } from '@mantine/hooks';
import { useEffect, useMemo, useRef } from 'react';
import uPlot from 'uplot';

import { SERIES_COLORS } from '../app/theme';
import { legendValue, type ChartData } from './series';

export interface ChartProps {
  title: string;
  data: ChartData;
  format: (value: number) => string;
  /** Largest value of the scale; grows with the data when absent. */
  max?: number | undefined;
  /** Rounds the scale to powers of two (bytes). */
  binary?: boolean;
  /** Charts with one key move their cursors together. */
  sync: string;
}

const HEIGHT = 170;
const TIME_AXIS: uPlot.Axis['values'] = [
  [3600 * 24 * 28, '{YYYY}-{MM}', null, null, null, null, null, null, 1],
  [3600 * 24, '{MM}-{DD}', '\n{YYYY}', null, null, null, null, null, 1],
  [60, '{HH}:{mm}', '\n{MM}-{DD}', null, '\n{MM}-{DD}', null, null, null, 1],
  [1, '{HH}:{mm}:{ss}', null, null, null, null, null, null, 1],
];

function binarySplits(_: uPlot, __: number, low: number, high: number): number[] {
  const step = 2 ** Math.max(0, Math.ceil(Math.log2(Math.max(1, high - low) / 4)));
  const splits = [];
  for (let value = Math.ceil(low / step) * step; value <= high; value += step) splits.push(value);
  return splits;
}

/** Without a pointer over the chart the legend tells the latest values. */
function showLatest(plot: uPlot): void {
  if (plot.cursor.idx === null || plot.cursor.idx === undefined) plot.setLegend({ idx: plot.data[0].length - 1 }, false);
}

function options(props: Omit<ChartProps, 'data' | 'title'>, labels: string[], scheme: 'light' | 'dark', width: number): uPlot.Options {
  const text = scheme === 'dark' ? '#a3adb8' : '#4f5a66';
  const grid = { stroke: scheme === 'dark' ? '#2b333c' : '#e6e9ed', width: 1 };
  const axis = { stroke: text, grid, ticks: { ...grid, size: 4 }, font: '11px system-ui, sans-serif' };
  return {
    width,
    height: HEIGHT,
    cursor: { sync: { key: props.sync }, y: false, points: { size: 6 } },
    legend: { live: true },
    hooks: { setCursor: [showLatest], setData: [showLatest], ready: [showLatest] },
    padding: [8, 10, 0, 0],
    scales: { y: { range: (_, __, high) => [0, props.max ?? (high > 0 ? high * 1.1 : 1)] } },
    axes: [
      { ...axis, values: TIME_AXIS, space: 70 },
      {
        ...axis,
        size: 78,
        space: 34,
        values: (_, splits) => splits.map((value) => props.format(value)),
        ...(props.binary ? { splits: binarySplits } : {}),
      },
    ],
    series: [
      { label: 'Time', value: '{MM}-{DD} {HH}:{mm}:{ss}' },
      ...labels.map((label, index) => ({
        label,
        stroke: SERIES_COLORS[scheme][index % 4] as string,
        width: 1.5,
        fill: `${SERIES_COLORS[scheme][index % 4]}1c`,
        points: { show: false },
        value: (_: uPlot, value: number | null | undefined) => legendValue(value, props.format),
      })),
    ],
  };
}

/** "CPU: now 3.1 %" for those who do not see the lines. */
function spoken(title: string, data: ChartData, format: (value: number) => string): string {
  const latest = data.lines.map((line) => {
    const value = line.values.findLast((entry) => entry !== null);
    return `${line.label} ${value === undefined || value === null ? 'not measured' : format(value)}`;
  });
  return `${title}, latest: ${latest.join(', ')}`;
}

export default function Chart({ title, data, format, max, binary = false, sync }: ChartProps) {
  const scheme = useComputedColorScheme('light');
  const { ref: sizeRef, width } = useElementSize();
  const holder = useRef<HTMLDivElement>(null);
  const plot = useRef<uPlot | null>(null);
  const aligned = useMemo(() => [data.times, ...data.lines.map((line) => line.values)] as uPlot.AlignedData, [data]);
  const latest = useRef(aligned);
  latest.current = aligned;
  const labels = data.lines.map((line) => line.label).join('\n');

  useEffect(() => {
    if (!holder.current || width < 50) return undefined;
    const made = new uPlot(options({ format, max, binary, sync }, labels.split('\n'), scheme, width), latest.current, holder.current);
    plot.current = made;
    return () => {
      plot.current = null;
      made.destroy();
    };
  }, [format, max, binary, sync, labels, scheme, width]);
  useEffect(() => plot.current?.setData(aligned), [aligned]);

  return (
    <div ref={sizeRef} role="img" aria-label={spoken(title, data, format)} className="atoll-chart" style={{ minHeight: HEIGHT + 28 }}>
      <div ref={holder} aria-hidden />
    </div>
  );
}
